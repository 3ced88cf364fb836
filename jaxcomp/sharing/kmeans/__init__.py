"""K-means of scalars and of vectors, and which table serves which element. Arrays in, arrays out."""
