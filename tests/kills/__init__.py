"""Kills every process of a run at random moments, starts it again, and compares the end with an undisturbed run's."""
