"""What `scripts/check_gpu.py` checks and times on a GPU, one section a function; on a CPU the same in small."""
