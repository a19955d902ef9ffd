"""Pages for people: HTML files that load nothing from elsewhere."""
