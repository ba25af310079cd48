"""Published memory that goes from one machine to another without files: one serves what it has published, and others pull it."""
