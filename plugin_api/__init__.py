"""What plugin authors and the sidecar agree on; a leaf that imports nothing of ours."""
