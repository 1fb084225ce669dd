"""How do ranks share it? The mesh, and which part of the model each rank holds."""
