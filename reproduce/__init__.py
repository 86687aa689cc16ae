"""Published results, run again: one script for each, with the published figures beside ours."""
