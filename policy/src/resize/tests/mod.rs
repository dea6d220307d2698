//! The rules by functions in a plain model: how many executions until an amount is right, and what that costs.

mod examples;
mod function;
mod properties;
mod sweep;
