"""What the library costs: `python -m benchmarks` measures time and memory of training steps, beside plain training and peers."""
