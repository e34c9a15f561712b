"""Mathematics of learning: answers, rewards, advantages, losses, KL, votes. No I/O, no model."""
