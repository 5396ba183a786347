"""PPO on dense rewards: rollouts, token rewards, advantages, clipped losses (method §5)."""
