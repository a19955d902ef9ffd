"""What several tests share: servers on loopback, small models, made-up data."""
