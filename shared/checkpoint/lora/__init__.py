"""LoRA adapters in PEFT's files: matched with their base, merged into it, written."""
