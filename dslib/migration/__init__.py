"""Moving from one model to another: what is kept, what is added, and how one goes back."""
