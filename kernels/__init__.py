"""Accelerator kernels. Kept free of side effects: Hugging Face probes a package of this name."""
