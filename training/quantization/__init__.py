"""Four-bit weights from a loaded model: calibration text, the walk through its layers, the report."""
