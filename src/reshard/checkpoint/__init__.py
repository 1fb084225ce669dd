"""What is ours, and is it whole? Our bytes: works for any state dict, needs no model and no trainer."""
