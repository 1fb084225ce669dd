"""What happens each step? loop.py is the plot; read it from top to bottom."""
