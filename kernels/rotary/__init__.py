"""RMS norm of queries and keys per head, and rotary position embedding."""
