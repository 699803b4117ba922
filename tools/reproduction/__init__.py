"""The rows of the paper's tables and of ours, trained and measured side by side: launch/reproduce.sh."""
