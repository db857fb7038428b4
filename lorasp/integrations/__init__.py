"""Other libraries' models, one file per library; each is imported only by what needs it."""
