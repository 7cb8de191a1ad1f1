"""What the driver's loop, `tensorspark.session`, is made of: checks, Spark jobs, published files, progress."""
