"""Files and generators -> Task, Demo."""
