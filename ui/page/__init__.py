"""The web page: steer and compare, see why, build, and look after what is stored."""
