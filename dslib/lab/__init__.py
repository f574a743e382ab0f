"""The laboratory: measuring, recording, checking claims and drawing. It imports nothing else of ours."""
