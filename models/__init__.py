"""What a target and a drafter are. Knows nothing of training, disks or serving engines."""
