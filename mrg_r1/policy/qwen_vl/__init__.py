"""What the families Qwen2.5-VL and Qwen3-VL share: files and ids, prompts and positions, rotation, tokenizer."""
