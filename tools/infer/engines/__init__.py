"""Inference engines: vLLM and transformers, behind one interface (`engine.Engine`)."""
