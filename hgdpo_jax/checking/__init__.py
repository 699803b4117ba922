"""What a command will read, need and take, before it is paid for."""
