"""What guards code generation: kernels compiled without a GPU, and their machine code read."""
