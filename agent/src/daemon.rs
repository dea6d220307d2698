//! `stokerd`: puts the parts together.
