"""FP8 training: recipes, scales, codes and products. Torch in, torch out; no Megatron."""
