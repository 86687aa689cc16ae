"""What the library costs: `python -m benchmarks` measures training steps beside plain ones and those of peers."""
