"""The workspace on disk: steps that are kept, a journal, one writer, resume by the same command."""
