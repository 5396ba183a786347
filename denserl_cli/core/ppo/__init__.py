"""PPO on dense rewards."""
