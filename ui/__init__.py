"""What a person meets: the command line and, later, the page."""
