"""Attribution: which tokens made the model say this rather than that."""
