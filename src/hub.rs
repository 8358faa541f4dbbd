//! The Hugging Face hub behind one struct.
