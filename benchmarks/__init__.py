"""What a step costs beside the network evaluations that its mathematics needs."""
