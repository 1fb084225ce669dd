"""What may one ask? One verb, one file; this is where rooms are joined."""
