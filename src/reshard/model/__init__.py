"""What is a Llama? Its shapes, names and arithmetic; nothing here knows of ranks or files."""
