"""What the chapters run and ``make record`` keeps. A file has its chapter's name, or begins with it."""
