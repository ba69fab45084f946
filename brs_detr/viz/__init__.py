"""Images of detections and plots of a run."""
