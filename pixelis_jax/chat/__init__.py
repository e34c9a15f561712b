"""Messages and images to tokens and patches, and the policy's text back to calls and answers."""
