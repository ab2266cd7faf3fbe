"""The token LM: `llama` (the model), `pattern` (codebook delays), `sampling` (logits to token), `generation` (the loops)."""
