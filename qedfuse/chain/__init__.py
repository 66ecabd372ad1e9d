"""From a path to an open image: names, policy, locks, probing, repair after a crash."""
