"""Long runs of mixed calls against the lab's agents, and what they leave behind."""
