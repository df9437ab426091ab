"""How a drafter is spread over several processes: Lightning's strategies, with one checkpoint."""
