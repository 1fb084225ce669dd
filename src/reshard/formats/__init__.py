"""How do others write it? Other people's bytes, read lazily."""
