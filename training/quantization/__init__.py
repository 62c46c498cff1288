"""Four-bit weights from a loaded model: calibration text, walk through its layers, report."""
