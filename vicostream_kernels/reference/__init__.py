"""The readable definition of truth of every op, in plain torch; float64 in gives float64 out."""
