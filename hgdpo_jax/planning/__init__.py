"""What a program will need on devices that are not here."""
