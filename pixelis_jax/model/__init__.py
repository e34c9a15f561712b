"""The policy: Qwen2.5-VL in Flax, as pure functions of a parameter tree."""
