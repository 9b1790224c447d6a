"""From a video to answers: source -> stages -> engine -> session; trace and report."""
